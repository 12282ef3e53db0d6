"""Jobs: requests that run later, survive restarts and are tried again.

docs/decisions/0080-jobs.md tells the whole way of a job.
"""
