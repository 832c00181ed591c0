"""Runs upstream's code on a machine without a GPU, for tests and benchmarks; see upstream_driver.driver."""
