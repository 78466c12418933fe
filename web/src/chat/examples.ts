// Problems to begin with, put as the model was trained to read them.

interface Example {
  task: string;
  title: string;
  text: string;
}

const EXAMPLES: readonly Example[] = [
  {
    task: "gcd",
    title: "Greatest common divisor",
    text: "Find the Greatest Common Divisor (GCD) of these numbers: 84, 36. Give only the GCD as your final answer.",
  },
  {
    task: "spell_backward",
    title: "A word backward",
    text: "Spell this word backward (example: sun -> nus): stone",
  },
  {
    task: "chain_sum",
    title: "A long sum",
    text: "State the final answer to the following arithmetic problem: 60 + 93 - 16 =",
  },
  {
    task: "leg_counting",
    title: "Counting legs",
    text:
      "Your task is to count how many legs there are in total when given a list of animals.\n\n" +
      "Now, how many legs are there in total if you have 3 horses, 2 tigers, 4 wasps?\n",
  },
];

export const examplesFor = (tasks: readonly string[]): Example[] => EXAMPLES.filter(({ task }) => tasks.includes(task));
