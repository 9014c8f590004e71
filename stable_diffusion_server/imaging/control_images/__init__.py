"""Control images: what turns a picture into the edges, tones or tiles that a ControlNet follows."""
