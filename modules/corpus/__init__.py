"""Reading a speech corpus: its files, its transcripts, its audio, and what is wrong with them."""
