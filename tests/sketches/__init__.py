"""Three experiments whose training has other forms than supervised learning, as short as the floor lets them be."""
