"""What is read of a model, and what is done to it for a time: displacement, state restored, experts routed."""
