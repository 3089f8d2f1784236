"""Score rows with a model: the loss of each token that is trained on, hidden states and greedy completions."""
