"""What an earlier end of the iterations saves and costs."""
