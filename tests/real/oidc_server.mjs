// A standards-strict OpenID Connect server on loopback, for tests: npm's oidc-provider, told to be as strict as it can.
//
// `node oidc_server.mjs '{"clients": [{"id", "secret" or "jwks", "auth", "grants"?}], "redirectUris": [], "accounts": {"ada": {…claims}},
// "accessTokenSeconds": 3600}'` prints one JSON line `{"issuer": …}` when it listens, and serves until it is stopped.
//
// PKCE is required, refresh tokens rotate at each use (reuse kills the grant), and they are given for `offline_access` only,
// which counts only beside `prompt=consent` (OpenID Connect Core 11). Log-in and consent are one page: POST
// `account=<id>&decision=allow|deny` to the address that the browser was sent to. POST `/withdraw/<account>` is what a person
// does in the settings of the account: every grant of it ends.

import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { createServer } from 'node:http';
import { text } from 'node:stream/consumers';
import Provider from 'oidc-provider';

const options = JSON.parse(process.argv[2]);
const server = createServer();
await new Promise((done) => server.listen(0, '127.0.0.1', done));
const issuer = `http://127.0.0.1:${server.address().port}`;

const client = ({ id, secret, auth, jwks, grants }) => ({
  client_id: id,
  ...(secret ? { client_secret: secret } : { jwks }),
  token_endpoint_auth_method: auth,
  redirect_uris: options.redirectUris,
  grant_types: grants ?? ['authorization_code', 'refresh_token'],
  response_types: ['code'],
});

const provider = new Provider(issuer, {
  clients: options.clients.map(client),
  claims: { openid: ['sub'], profile: ['name'], email: ['email', 'email_verified'] },
  scopes: ['openid', 'offline_access'],
  cookies: { keys: [randomBytes(32).toString('hex')] },
  jwks: { keys: [generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey.export({ format: 'jwk' })] },
  features: {
    clientCredentials: { enabled: true },
    deviceFlow: { enabled: true },
    devInteractions: { enabled: false },
    introspection: { enabled: true },
    revocation: { enabled: true },
  },
  findAccount: (ctx, id) => options.accounts[id] && { accountId: id, claims: () => ({ sub: id, ...options.accounts[id] }) },
  interactions: { url: (ctx, interaction) => `/interaction/${interaction.uid}` },
  pkce: { required: () => true },
  rotateRefreshToken: true,
  ttl: {
    AccessToken: options.accessTokenSeconds ?? 3600,
    AuthorizationCode: 60, Grant: 3600, IdToken: 3600, Interaction: 600, RefreshToken: 3600, Session: 3600,
  },
});

const grantIds = new Map();

async function answer(request, response) {
  const { prompt, params, session, grantId } = await provider.interactionDetails(request, response);
  if (request.method !== 'POST') {
    return response.end(`${prompt.name}: POST account=<id>&decision=allow|deny here\n`);
  }
  const form = new URLSearchParams(await text(request));
  return provider.interactionFinished(request, response, await decide(form, { prompt, params, session, grantId }));
}

async function decide(form, { prompt, params, session, grantId }) {
  if (form.get('decision') === 'deny') return { error: 'access_denied' };
  if (prompt.name === 'login') return { login: { accountId: form.get('account') } };
  const known = grantId && (await provider.Grant.find(grantId));
  const grant = known || new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
  grant.addOIDCScope(params.scope);
  const id = await grant.save();
  grantIds.set(session.accountId, [...(grantIds.get(session.accountId) ?? []), id]);
  return { consent: { grantId: id } };
}

async function withdraw(account, response) {
  for (const id of grantIds.get(account) ?? []) await (await provider.Grant.find(id))?.destroy();
  grantIds.delete(account);
  response.writeHead(204).end();
}

const handle = provider.callback();
server.on('request', (request, response) => {
  const [, first, rest] = request.url.split('/');
  if (first === 'withdraw' && request.method === 'POST') return withdraw(rest, response);
  if (first !== 'interaction') return handle(request, response);
  return answer(request, response).catch((error) => response.writeHead(400).end(`${error}\n`));
});
console.log(JSON.stringify({ issuer }));
