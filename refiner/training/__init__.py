"""Training: objectives, and the rollouts that they are computed on."""
