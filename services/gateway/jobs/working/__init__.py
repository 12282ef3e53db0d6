"""Jobs being run by this gateway.

`worker` claims what is due, keeps its leases (`leases`) and reports. What a job does is its kind's `Runner`:
`requests` runs a caller's request as the edges do, on behalf of whom `identities` lets act; `webhooks` tells
of a job's end, to addresses that `webhook_addresses` allows. `outcomes` turns errors into reports. `request`
reads what is sealed and writes results; `telemetry` counts.
"""
