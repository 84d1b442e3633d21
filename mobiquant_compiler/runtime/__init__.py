"""What happens while a model runs: budgets, telemetry, launches, weights bound to slices."""
