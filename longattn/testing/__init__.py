"""What tests and benchmarks share: one table of inputs (cases) and the error budgets (assertions)."""
