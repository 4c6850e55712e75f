"""Private Redis and Kafka servers on this machine, for the demo and the tests."""
