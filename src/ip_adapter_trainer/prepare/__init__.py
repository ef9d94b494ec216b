"""`ip-adapter prepare` and `check`: run the frozen encoders over a training set once; look a set over."""
