"""Everything that speaks Flower: messages, apps, the round loop and the engines that run it."""
