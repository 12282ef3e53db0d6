"""What clients prove themselves with: its form, how it is kept, and whether it is still good.

- `keys`: the form of API keys and client secrets; `service_secrets`: those of the four services
- `proof`: proves a credential; `assertions`: one that a client has signed
- `last_use`: when API keys were last used
"""
