// A standard OAuth2 client (openid-client) against llmos: discovers the issuer, gets a token, exchanges,
// introspects and revokes it. Takes its settings as JSON on stdin, and prints what happened as JSON.
import * as oauth from 'openid-client'
import { readFileSync } from 'node:fs'

const given = JSON.parse(readFileSync(0, 'utf8'))
const options = { algorithm: 'oauth2', execute: [oauth.allowInsecureRequests] }

async function run(authentication) {
  const config = await oauth.discovery(
    new URL(given.issuer), given.client_id, undefined, authentication, options)
  const first = await oauth.clientCredentialsGrant(config, { scope: 'generate models.read' })
  const second = await oauth.genericGrantRequest(
    config, 'urn:ietf:params:oauth:grant-type:token-exchange', {
      subject_token: first.access_token,
      subject_token_type: 'urn:ietf:params:oauth:token-type:access_token',
      scope: 'generate',
    })
  const before = await oauth.tokenIntrospection(config, first.access_token)
  await oauth.tokenRevocation(config, first.access_token)
  const after = await oauth.tokenIntrospection(config, first.access_token)
  return {
    issuer: config.serverMetadata().issuer, first: first.access_token, second: second.access_token,
    second_scope: second.scope, second_type: second.issued_token_type, before, after,
  }
}

async function refused(authentication) {
  const config = await oauth.discovery(
    new URL(given.issuer), given.client_id, undefined, authentication, options)
  try {
    await oauth.clientCredentialsGrant(config)
  } catch (error) {
    return { code: error.error ?? error.code, status: error.status ?? error.cause?.status }
  }
  return { code: '' }
}

const key = await crypto.subtle.importKey(
  'jwk', given.private_jwk, { name: 'ECDSA', namedCurve: 'P-256' }, false, ['sign'])
console.log(JSON.stringify({
  basic: await run(oauth.ClientSecretBasic(given.client_secret)),
  post: await run(oauth.ClientSecretPost(given.client_secret)),
  private_key_jwt: await run(oauth.PrivateKeyJwt({ key, kid: given.private_jwk.kid })),
  wrong: await refused(oauth.ClientSecretPost('not the secret')),
}))
