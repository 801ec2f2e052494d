// The TypeScript SDK that speaks 2026-07-28 without a handshake: sdk2.mjs URL CALLBACK. Logs in and calls a tool.
import { Client, StreamableHTTPClientTransport, UnauthorizedError } from '@modelcontextprotocol/client';
import { Login, agreeing, cameBackWith, say } from './login.mjs';

const [url, callback] = process.argv.slice(2);
const login = new Login(callback, 'TypeScript SDK 2');
const transport = () => new StreamableHTTPClientTransport(new URL(url), { authProvider: login });
const asked = [];
const client = () => {
  const made = new Client(
    { name: 'sdk2', version: '1' },
    { capabilities: { elicitation: { form: {} } }, versionNegotiation: { mode: { pin: '2026-07-28' } } },
  );
  made.setRequestHandler('elicitation/create', agreeing(asked));
  return made;
};

const first = transport();
try {
  await client().connect(first);
  throw new Error('it came in without a login');
} catch (error) {
  if (!(error instanceof UnauthorizedError)) throw error;
}
await first.finishAuth((await cameBackWith()).searchParams);

const connected = client();
await connected.connect(transport());
const { tools } = await connected.listTools();
const answer = await connected.callTool({ name: 'ssh_execute', arguments: { command: 'echo hello' } });
say({
  version: connected.getNegotiatedProtocolVersion(),
  tools: tools.map((tool) => tool.name),
  result: answer.structuredContent,
  asked,
});
process.exit(0);
