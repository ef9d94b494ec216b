"""The rows of a training set, from any form they come in, and what is wrong with them."""
