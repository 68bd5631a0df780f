"""Classes that take the place of other packages' averages; each is loaded when it is asked for."""
