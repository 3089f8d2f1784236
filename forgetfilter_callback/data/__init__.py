"""Load rows, tokenize them and give each one a stable sample id."""
