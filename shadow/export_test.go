package shadow

// WithoutGracePeriods has brackets not wait for whoever uses a page that they take
// away, for tests from outside.
func WithoutGracePeriods(t *Tracker) { t.slots.mutant = noGracePeriod }
