"""OpenAI's batches: a file with one request a line becomes as many jobs, and their answers become a file.

A batch is a job of its own kind. `batches` hands it in and says where it stands, `lines` reads its file,
`runner` is what a worker does with it, `output` writes its answers, `request` knows the messages, `answers`
and `http` are the routes. docs/decisions/0080-jobs.md tells the way of a job.
"""
