"""The framework-free part: activations, quality functions, putting both into hosts. Imports torch and numpy only."""
