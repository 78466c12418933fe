// Runs before the first paint, so that a chosen theme does not flash in the other one. See src/ui/theme.tsx.
try {
  const theme = JSON.parse(localStorage.getItem("openbook.theme") ?? '"system"');
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // The browser keeps nothing: its own theme holds.
}
