package gvmtest

import "fmt"

// Panics returns what f panics with, as text; it is empty if f returns.
func Panics(f func()) (text string) {
	defer func() {
		if p := recover(); p != nil {
			text = fmt.Sprint(p)
		}
	}()
	f()
	return ""
}
