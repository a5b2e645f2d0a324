"""What a model and its codes do: measures, likelihoods, traces, usage, explanations."""
