"""Preference training from the door: DPO on SmolLM2, right answers against wrong ones."""
