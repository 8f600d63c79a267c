"""What stands behind experiment.py: many runs as one plan.

plan.py        what a plan holds
protocol.py    which of its jobs can be named by now
jobs.py        one job: what has been done of it, and how it is started or gone on with
comparison.py  what comes out: tables, tests, plots, a page
"""
