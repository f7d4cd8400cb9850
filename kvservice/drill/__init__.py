"""Faults on purpose: a proxy that breaks connections, a deployment to break, scripted faults, input fuzzing, doctor."""
