"""Every method against every check of the test suite."""
