"""How much callers may use: rates, concurrency and budgets of their plans, by key, client, tenant and model.

    plans          which limits a request meets, worked out once for a caller and a model
    limiter        the port: reserve, correct, settle, remaining; what a limit counts and what is left of it
    counting       the arithmetic of limits
    memory         the port in this process
    redis_limiter  the port in Redis, which several gateways share; `script` is what Redis runs
    refusal        a limit that is reached, as an error that says which, how much and when again
    headers        what is left, in the headers of OpenAI's API
    guard          what the use case calls

All limits of a request are taken together or not at all. What a request may use at most is reserved when it
comes in, corrected when the engine has counted its prompt, and settled at its end with what it did use.
"""
