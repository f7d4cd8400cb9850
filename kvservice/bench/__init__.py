"""How fast it is: the engine alone, and the service under long-document sessions. Prints nothing."""
