"""Files from somebody else: none of them runs code, reaches a shell or another program, or writes to a terminal."""
