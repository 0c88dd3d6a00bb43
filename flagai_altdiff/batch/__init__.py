"""Very many pictures: a file of prompts drawn by many processes and machines, each picture once."""
