"""The framework-free part: activations, quality functions, putting both into hosts. Imports no framework."""
