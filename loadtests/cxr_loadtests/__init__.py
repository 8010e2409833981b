"""Load tests of a running service: scenarios, judgement, comparison, and capacity planning.

A service is known from outside only, by its protocols and its metrics. Locust drives the clients;
`cxr_loadtests.drive` is the only module that imports it, because it replaces blocking calls
in the whole process.
"""
