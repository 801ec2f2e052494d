// An application that knows MCP Apps, with its makers' own code for it: what `test_system_view.py` opens in Chromium.
// `show` connects to the server, calls the tool, and lends its view the frame of a sandbox on another origin.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { AppBridge, PostMessageTransport, getToolUiResourceUri } from '@modelcontextprotocol/ext-apps/app-bridge';

const TOOL = 'ssh_system_info';
const capabilities = { extensions: { 'io.modelcontextprotocol/ui': { mimeTypes: ['text/html;profile=mcp-app'] } } };

window.said = [];
window.addEventListener('message', ({ data }) => window.said.push(data));

async function connected(url, token, mode) {
  const client = new Client({ name: 'host', version: '1' }, { capabilities, versionNegotiation: { mode } });
  const requestInit = { headers: { Authorization: `Bearer ${token}` } };
  await client.connect(new StreamableHTTPClientTransport(new URL(url), { requestInit }));
  return client;
}

window.show = async ({ url, token, mode, sandbox, offers, context, input, result, instead }) => {
  const client = await connected(url, token, mode);
  const { tools } = await client.listTools();
  const uri = getToolUiResourceUri(tools.find(({ name }) => name === TOOL));
  const [{ text, _meta }] = (await client.readResource({ uri })).contents;
  const html = Object.entries(instead).reduce((page, [old, other]) => page.replace(old, other), text);
  const frame = document.querySelector('iframe');
  const bridge = new AppBridge(client, { name: 'host', version: '1' }, offers, { hostContext: context });
  const ready = new Promise((resolve) => { bridge.onsandboxready = resolve; });
  const initialized = new Promise((resolve) => { bridge.oninitialized = resolve; });
  bridge.onsizechange = ({ height }) => { frame.style.height = `${height}px`; };
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  frame.src = sandbox;
  await ready;
  await bridge.sendSandboxResourceReady({ html, sandbox: 'allow-scripts', csp: _meta.ui.csp });
  await initialized;
  await bridge.sendToolInput({ arguments: input });
  const answer = result ?? (await client.callTool({ name: TOOL, arguments: input }));
  await bridge.sendToolResult(answer);
  Object.assign(window, { bridge, client });
  return { app: bridge.getAppVersion(), version: client.getNegotiatedProtocolVersion(), meta: _meta };
};
