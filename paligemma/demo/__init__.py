"""What only the page needs: which models are loaded, how an answer is drawn, and the example images."""
