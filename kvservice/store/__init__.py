"""What outlives a worker: sessions, locks, repeats, the fleet. Torch-free."""
