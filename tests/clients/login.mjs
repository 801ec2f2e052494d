// What both SDKs want of an application: what it keeps, and how it sends somebody to log in.
import { createInterface } from 'node:readline';

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

export const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

/** Return the URL at which the browser came back: the test, which is the browser, writes it as a line. */
export const cameBackWith = async () => new URL((await lines.next()).value);

/** Return a person who agrees to whatever they are asked, and notes it. */
export const agreeing = (asked) => async ({ params }) => {
  asked.push(params.message);
  return { action: 'accept', content: { agree: true } };
};

export class Login {
  constructor(redirectUrl, name) {
    this.redirectUrl = redirectUrl;
    this.clientMetadata = {
      client_name: name,
      redirect_uris: [redirectUrl],
      grant_types: ['authorization_code', 'refresh_token'],
      response_types: ['code'],
      token_endpoint_auth_method: 'none',
    };
  }

  state() { return 'state of the test'; }

  clientInformation() { return this.client; }

  saveClientInformation(client) { this.client = client; }

  tokens() { return this.kept; }

  saveTokens(tokens) { this.kept = tokens; }

  redirectToAuthorization(url) { say({ authorize: url.href }); }

  saveCodeVerifier(verifier) { this.verifier = verifier; }

  codeVerifier() { return this.verifier; }
}
