"""inference: runs models and streams what they say.

It owns models, the queue before them, sampling, and the truth about whether they serve. It does not own
callers, limits or audit: only the gateway may call it, and has settled those.

A request: `servicer` turns the message into a `GenerationRequest` (`request`) -> `telemetry` measures it ->
an engine (`engine.port`) runs it: `backends.embedded` in a child process, or `backends.echo` -> events become
messages again, numbered. The end of the call, whatever the cause, ends the work.

`settings` is what can be told, `app` puts it together, `models` knows where weights come from, and `quantise`
makes folders of fewer bits.
"""
