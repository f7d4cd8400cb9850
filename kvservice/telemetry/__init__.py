"""What the service says about itself: logs, metrics, traces. Knows nothing of what is logged, counted or traced."""
