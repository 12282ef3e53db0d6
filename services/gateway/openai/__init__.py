"""OpenAI's routes: their requests, their answers, and the document that describes both.

Each kind of request has its type (`chat`, `completions`, `responses`); `request` translates all of them to
the message that a gRPC caller would send, and `*_answers` write what comes back.
"""
