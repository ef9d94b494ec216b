"""`ip-adapter prepare`: runs the frozen encoders over a training set once, into a prepared set."""
