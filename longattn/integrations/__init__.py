"""longattn inside other libraries. Each module here loads its library when its functions are called, not before."""
