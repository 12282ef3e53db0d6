// A real OpenID Connect provider on a free loopback port, for tests/e2e/test_oidc_exchange.py. It says where it is
// in one line of JSON, and ends when its standard input does.

import { createServer } from 'node:http'

import { Provider } from 'oidc-provider'

const AUDIENCE = 'llmos'
const RESOURCE = 'https://llmos.example'
const CALLBACK = 'http://127.0.0.1/callback'
const GROUPS = { alice: ['staff', 'ml'], bob: ['staff'] }

const server = createServer()
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const issuer = `http://127.0.0.1:${server.address().port}`

const provider = new Provider(issuer, {
  clients: [
    {
      // A program: it gets a JWT access token for AUDIENCE.
      client_id: 'batch',
      client_secret: 'secret-of-batch',
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: []
    },
    {
      // A web application: its people get ID tokens.
      client_id: AUDIENCE,
      client_secret: 'secret-of-llmos',
      redirect_uris: [CALLBACK]
    }
  ],
  claims: { openid: ['sub', 'groups', 'name'] },
  conformIdTokenClaims: false,
  findAccount: (_, id) => ({
    accountId: id,
    claims: () => ({ sub: id, name: `${id} of the example`, groups: GROUPS[id] ?? [] })
  }),
  extraTokenClaims: (_, token) => (token.kind === 'ClientCredentials' ? { groups: ['programs'] } : undefined),
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => undefined,
      getResourceServerInfo: () => ({
        scope: '',
        audience: AUDIENCE,
        accessTokenFormat: 'jwt',
        accessTokenTTL: 300
      })
    }
  }
})

server.on('request', provider.callback())
console.log(JSON.stringify({ issuer, audience: AUDIENCE, resource: RESOURCE, callback: CALLBACK }))
process.stdin.resume()
process.stdin.on('end', () => process.exit(0))
