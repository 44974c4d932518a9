"""Does every architecture of transformers start as it is?"""
