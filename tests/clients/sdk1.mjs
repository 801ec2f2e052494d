// The TypeScript SDK of the handshake era: sdk1.mjs URL CALLBACK. Logs in, calls a tool, renews its token, calls again.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { UnauthorizedError } from '@modelcontextprotocol/sdk/client/auth.js';
import { SSEClientTransport } from '@modelcontextprotocol/sdk/client/sse.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';
import { Login, agreeing, cameBackWith, say } from './login.mjs';

const [url, callback] = process.argv.slice(2);
const Transport = url.endsWith('/sse') ? SSEClientTransport : StreamableHTTPClientTransport;
const login = new Login(callback, 'TypeScript SDK 1');
const transport = () => new Transport(new URL(url), { authProvider: login });
const asked = [];
const client = () => {
  const made = new Client({ name: 'sdk1', version: '1' }, { capabilities: { elicitation: {} } });
  made.setRequestHandler(ElicitRequestSchema, agreeing(asked));
  return made;
};

const first = transport();
try {
  await client().connect(first);
  throw new Error('it came in without a login');
} catch (error) {
  if (!(error instanceof UnauthorizedError)) throw error;
}
await first.finishAuth((await cameBackWith()).searchParams.get('code'));

const call = async () => {
  const connected = client();
  await connected.connect(transport());
  const { tools } = await connected.listTools();
  const answer = await connected.callTool({ name: 'ssh_execute', arguments: { command: 'echo hello' } });
  await connected.close();
  return { tools: tools.map((tool) => tool.name), result: answer.structuredContent, asked };
};

say(await call());
const before = login.kept;
// no longer a token that opens anything: the SDK must renew it by itself
login.kept = { ...before, access_token: 'x' };
say({ ...await call(), renewed: login.kept.refresh_token !== before.refresh_token });
process.exit(0);
