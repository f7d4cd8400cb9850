"""What the service says about itself: logs. Knows nothing of what is logged."""
