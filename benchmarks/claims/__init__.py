"""Claims and open questions of the playbook, put to the test: `python -m benchmarks.claims`."""
