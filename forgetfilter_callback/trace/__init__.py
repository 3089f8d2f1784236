"""Store the losses of the noisy set at every checkpoint on disk, and read and validate them."""
