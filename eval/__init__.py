"""Generation, benchmarks and the report."""
