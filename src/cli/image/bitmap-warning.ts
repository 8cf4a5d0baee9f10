/** What is said of an image whose bitmaps another program made invalid, whatever is done with it. */
export function bitmapsWarning(filename: string): string {
  return `${filename}: a program that does not know bitmaps has changed this image, so its bitmaps are no longer valid; check -r leaks frees the clusters they take`
}
